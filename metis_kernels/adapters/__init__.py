"""What knows another library: hf.py is the only file here that imports transformers."""
