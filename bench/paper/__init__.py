"""What the paper of FedKD published, and what it takes to compare with it."""
