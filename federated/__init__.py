"""Private statistics and learning on data that stays on people's devices. See DESIGN.md."""
