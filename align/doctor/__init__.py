"""``align doctor``: can a bitwise match be expected on this machine?"""
