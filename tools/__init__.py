"""Scripts that only read run folders or start runs; nothing imports them."""
