"""What MuonDashboard puts on the pages of TensorBoard."""
