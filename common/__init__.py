"""What every room needs: errors that a user can put right, files that are never half written."""
