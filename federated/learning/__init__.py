"""Models over people's own days, trained under the same guard, noise and budget. See DESIGN.md."""
