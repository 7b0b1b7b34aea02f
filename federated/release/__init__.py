"""What is given out of a study: the answer as JSON (`document`), and as a report (`report`)."""
