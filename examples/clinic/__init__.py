"""The clinic: an app that knows nothing of Havengate, for the demo, tests and benchmarks.

`python -m examples.clinic --port 8090 --database PATH [--load]` serves FHIR R4 over SQLite, pages
about patients, and a mood diary. It asks nobody to sign in: it is what stands behind a gateway.
"""

from examples.clinic.people import Loaded, load

__all__ = ["Loaded", "load"]
