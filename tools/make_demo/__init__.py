"""Makes the models that ship under src/regraft/demo/data; not part of the installed package."""
