"""What a commit request is: its bytes, its mutations, and the window that decides whether it conflicts."""
