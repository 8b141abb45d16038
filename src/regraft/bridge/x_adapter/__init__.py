"""X-Adapter: a mapper that carries what the old base's decoder holds into the new base's, and any plug-in with it."""
