"""DiffuseMix at load time."""
