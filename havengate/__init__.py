"""The one command, `havengate`, and the one configuration file.

What lives here: the wiring of the packages below into a program for people. What does not: any
rule, key or record; those belong to `gateway`, `federated`, `policies`, `audit` and `keys`.
"""

__version__ = "0.1.0.dev0"
