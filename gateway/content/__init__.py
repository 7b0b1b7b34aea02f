"""JSON of other apps: path templates and pointers instead of FHIR's rules."""
