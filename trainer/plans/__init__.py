"""What `metis plan` computes with: sizes of models, and the formulas of memory."""
