"""What a setting may be, and how a program reads its command line and ends."""
