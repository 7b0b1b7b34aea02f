"""The enforcement core: what happens to an exchange, without any I/O."""
