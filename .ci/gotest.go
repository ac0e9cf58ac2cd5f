// Command gotest runs "go test -json" with the given arguments and prints what "go test" would: a line a package,
// and the output of what failed. Other than "go test" it takes a skipped test for a failure, and says which, since
// a test that CI skips protects nothing. It ends with the number of tests.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// An event is what "go test -json" reports (see "go doc test2json").
type event struct {
	Action  string
	Package string
	Test    string // empty: the package itself
	Output  string
}

func main() {
	cmd := exec.Command("go", append([]string{"test", "-json"}, os.Args[1:]...)...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Println("gotest:", err)
		os.Exit(2)
	}

	var passed, failed, skipped int
	type test struct{ pkg, name string }
	outputs := map[test]*strings.Builder{} // of what has not ended yet
	for lines := bufio.NewReader(stdout); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			break // the end: of what went wrong the exit status speaks
		}
		var e event
		if json.Unmarshal([]byte(line), &e) != nil {
			fmt.Print(line)
			continue
		}
		id := test{e.Package, e.Test}
		out := outputs[id]
		if out == nil {
			out = new(strings.Builder)
			outputs[id] = out
		}
		top := !strings.Contains(e.Test, "/")
		switch e.Action {
		case "build-output":
			fmt.Print(e.Output)
		case "output":
			out.WriteString(e.Output)
		case "pass", "skip", "fail":
			delete(outputs, id)
			switch {
			case e.Test == "" && e.Action == "fail":
				// A panic or a timeout leaves tests that have not ended.
				for other, rest := range outputs {
					if other.pkg == e.Package {
						fmt.Print(rest)
						delete(outputs, other)
					}
				}
				fmt.Print(out)
			case e.Test == "":
				// The last line is the result: ok, or that there are no test files.
				result := strings.TrimSuffix(out.String(), "\n")
				fmt.Println(result[strings.LastIndex(result, "\n")+1:])
			case e.Action == "skip":
				fmt.Printf("%sa skipped test is a failure here: %s in %s\n", out, e.Test, e.Package)
				skipped++
			case e.Action == "fail":
				fmt.Print(out)
				if top {
					failed++
				}
			case top:
				passed++
			}
		}
	}
	err = cmd.Wait()
	fmt.Printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	if err != nil || passed == 0 || failed > 0 || skipped > 0 {
		os.Exit(1)
	}
}
