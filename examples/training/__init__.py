"""The parts of examples/train.py, one purpose each."""
