"""placeholder"""
class LoRAModel: pass
