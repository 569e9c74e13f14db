"""Loading: samples for training: the dataset, and the loader that replaces DataLoader."""
