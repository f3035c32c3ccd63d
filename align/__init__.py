"""align: the harness that proves that two trainers compute the same losses, bit for bit.

``align run`` trains a reference bundle's model with paddledsv4 and compares every loss with the recorded one;
``align compare`` does the comparison alone, for two logs of any trainer.
"""
