"""What a mixture's layers are asked for, and how slots are shared out by it."""
