"""Who asks: tokens of an identity provider, own accounts and sessions, service accounts."""
