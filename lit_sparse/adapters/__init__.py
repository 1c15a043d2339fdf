"""Low-rank layers around frozen ones, and the surgery that puts them into a backbone; knows no paper."""
