def test_the_whole_way(scored):
    frame = scored.metrics(sketcher="small")
    assert set(frame["metric"]) == {"mean_max_influence", "ft_pt_ratio", "ft_wins", "pt_dominance", "format_effect"}
