"""The loader under training frameworks, one module each. Lightning needs none: docs/dropin.md."""
