"""How far one model's predictions lie from another's, and how well either predicts a text."""
