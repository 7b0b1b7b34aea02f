"""FHIR R4: what a request asks for, whose a resource is, and what of an answer may be released."""
