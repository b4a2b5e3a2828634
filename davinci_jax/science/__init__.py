"""What runs teach: reports of single runs."""
