-- The closure checks as recorded when the tables were written: expected, found, residual, tolerance, verdict
SELECT run_id, "check", scope, passed, expected_mj, found_mj, residual_mj, residual_share, tolerance_share,
    residual_ns, tolerance_ns, note
FROM closure
ORDER BY run_id, "check", scope
