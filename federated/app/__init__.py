"""The Flower app: what Flower is told that the federation runs. Thin, and never shipped as code."""
