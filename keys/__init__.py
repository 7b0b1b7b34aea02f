"""Keys of persons, kept by Vault: sealing, searching, rotating, erasing. See DESIGN.md."""
