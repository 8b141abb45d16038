"""How often the judge of the benchmark's pictures is right."""
