//go:build !unix

package fileengine

func addSystemRoles(map[string]func(folder string) error) {}
