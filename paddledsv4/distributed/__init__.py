"""Many ranks: who belongs to which group, and the collectives between them."""
