"""What is installed on a device or at a site: the store, the guard, the own budget, receipts."""
