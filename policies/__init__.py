"""Rules, labels and consent: who may do what, and why. See DESIGN.md."""
