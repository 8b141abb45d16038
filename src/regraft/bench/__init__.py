"""The benchmark: pairs of bases, adapters trained on both, and what each method carries from one to the other."""
