"""The way out: which apps may call, where to, and the certificates shown to them meanwhile."""
