"""The processes of a federation: SuperLink, nodes, TLS between them, `up` on one machine."""
