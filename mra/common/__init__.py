"""What commands share that need none of the heavy libraries."""
