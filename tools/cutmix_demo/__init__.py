"""Cut-Mix-Unmix on the demo's base: two new subjects in one picture, with and without it."""
