"""The parts of `build_demo.py`: synthetic text, training, measuring and writing of the demo bundle."""
