"""The loader under training frameworks, one module each. Lightning takes the loader as it is: docs/dropin.md."""
