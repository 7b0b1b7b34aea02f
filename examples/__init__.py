"""Programs that show Havengate at work."""
