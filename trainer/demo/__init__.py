"""The demo's own data and model: a seeded generator of support tickets, and a small chat model from a PyPI wheel."""
