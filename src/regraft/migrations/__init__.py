"""Migrations as files: their header, their precision, their algebra, and the graph that a folder of them is."""
