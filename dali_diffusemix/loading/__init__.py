"""Loading: samples for training: the dataset, and the loader that takes DataLoader's place."""
