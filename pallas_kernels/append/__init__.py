"""Writing new keys and values into the page pool."""
