"""Where the time of a step goes: a Chrome trace per chosen rank, and a table of ops made from it."""
