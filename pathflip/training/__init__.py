"""The training library: configuration, data, objectives and the loop; never imports Ray."""
