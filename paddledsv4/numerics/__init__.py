"""What a number means: the registry of operations and their variants, and the policy that chooses among them."""
