"""Densities of a field: RegularizedCNF, its base, contexts and distribution."""
